"""Numbers and how they are shown: conditions, quantities, statistics, results with named axes, plots, HTML tables."""
