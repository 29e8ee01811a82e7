"""Numbers and how they are shown: conditions, quantities, statistics, results with named axes, plots, tables as HTML."""
