"""The command line, installed as ``modmoe.cli``: one file a command, heavy imports only inside commands."""

if __name__ != "modmoe.cli":
    raise ImportError(f"this package is modmoe.cli; it cannot be imported as '{__name__}'.")
