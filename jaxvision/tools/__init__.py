"""Small commands: ``python -m jaxvision.tools.<name> --help``."""
