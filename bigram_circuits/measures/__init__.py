"""Numbers and how they are shown: statistics, results with named axes, their plots, and tables as HTML."""
