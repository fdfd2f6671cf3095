"""Online inference over HTTP: the endpoint, its page, authentication, metrics."""
