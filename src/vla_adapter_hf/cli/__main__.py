"""`python -m vla_adapter_hf.cli`, for launchers such as torchrun that start a module."""

from vla_adapter_cli import app


if __name__ == "__main__":
    app(prog_name="vla-adapter")
