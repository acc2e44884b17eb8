"""The method, pure: arrays in, arrays out; what the method section of a paper says."""
