"""Rewards that were learned from data: reward models, the data they are fitted to, and the fitting."""
