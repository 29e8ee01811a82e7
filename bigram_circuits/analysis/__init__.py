"""What a subnetwork does inside the model: functions of (model, subnetwork) that give frozen results.

Every analysis measures the full model and, where a subnetwork is given, the subnetwork, its complement and a matched
random subnetwork on the same text, side by side.
"""
