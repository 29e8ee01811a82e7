"""Measurements and their presentation: conditions, quantities, statistics, results with named axes, plots, tables."""
