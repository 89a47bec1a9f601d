"""What the suite costs and what its agents learn, measured."""
