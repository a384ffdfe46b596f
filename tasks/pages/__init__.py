"""Pages for people, made by tasks."""
