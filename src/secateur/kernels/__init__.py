"""Fast paths of what the project does most, each with a plain torch form that says the same."""
