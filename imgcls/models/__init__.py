"""Models by name, the bundle that carries one, and the classifier that runs it; without Ray."""
