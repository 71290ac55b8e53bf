"""From portable graphs to the engines of a target."""
