"""The page to try models on: one file that the endpoint serves, and what it saves."""
