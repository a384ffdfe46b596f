"""How a flow is run: state hooks, signals, the embedded API, the process environment."""
