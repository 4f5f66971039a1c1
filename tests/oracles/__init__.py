"""Float64 references, written from the definitions and independent of the package."""
