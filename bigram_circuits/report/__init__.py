"""Pages about a run, or about several: results in, HTML out. Nothing here touches a model.

`page` writes the page of a run. Its sections are functions in `outcome`, `inside` and `reading`, registered in
`sections`. `comparison` writes the page that sets several subnetworks side by side; its sections are in
`compared_measures` and `compared_weights`. `ladder` writes that of an n-gram ladder, `curves` that of faithfulness
curves. Sections are plain text, `blocks`; `document` makes one HTML file of them.
"""
