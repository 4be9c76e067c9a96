"""What the three servers must agree on: the model's geometry and files, the feature plane, the service conventions."""
