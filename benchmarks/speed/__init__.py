"""Programs that measure speed. Compare ratios of things measured in turns in one run; seconds belong to a machine."""
