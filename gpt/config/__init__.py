"""What can be decided about a run: sections, rules and loading of the TOML file."""
