"""A page about a run: results in, pictures out. It reads the run's folder and never touches a model.

`story` decides what is told and in which words, `figures` draws what is not a result's own `.plot()`, and `page` makes
one HTML file of it.
"""
