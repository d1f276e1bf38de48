"""The operators: for each a documented function, its fake kernel, and its twin in `reference`."""
