"""What a subnetwork is asked to reproduce: a base class, and one module for each target."""
