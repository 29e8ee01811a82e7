"""What a `TaskTarget` may ask of a model's answers, one module for each measure."""
