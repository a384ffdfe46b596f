"""Import models and configs from other projects, and export models."""
