"""A page about a run, or about several: results in, pictures out. It reads run folders and never touches a model.

`story` decides what is told of a run and in which words, `figures` draws what is not a result's own `.plot()`, and
`page` makes one HTML file of it. `compared` reads several runs or subnetworks of one model and lets them overlap;
`comparison` tells of them and makes their page.
"""
