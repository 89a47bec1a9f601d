"""One self-contained page about a run or the results of a suite."""
