"""Learning a subnetwork: the recipe, the loop, and how much memory it takes."""
