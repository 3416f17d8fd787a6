"""`lora-train`: reads the command line and calls `train.run`."""

import sys

import tyro

from lora_jax.errors import InputError
from train.config import Config
from train.presets import preset


def parse(arguments: list[str]) -> Config:
    """The run that the command line describes; a preset's settings are its defaults."""
    name = _preset_name(arguments)
    chosen = preset(name) if name else {}
    return tyro.cli(
        Config,
        prog="lora-train",
        args=arguments,
        default=Config(data=(), out=tyro.MISSING, preset=name, **chosen),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _preset_name(arguments: list[str]) -> str:
    """The value of --preset, which has to be known before the other defaults are."""
    for index, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--preset":
            return value or (arguments[index + 1] if index + 1 < len(arguments) else "")
    return ""


def main() -> None:
    """Trains a module; what cannot be used is told in one line, with status 2."""
    try:
        config = parse(sys.argv[1:])
        from lora_jax import runtime, wheels

        wheels.accept(config.accept)
        runtime.prepare()
        from train.run import train

        print(train(config))
    except (InputError, OSError) as error:
        sys.exit(_told(f"error: {error}", 2))
    except KeyboardInterrupt as stopped:
        sys.exit(_told(str(stopped) or "stopped; a checkpoint, if there is one, can --resume", 130))


def _told(message: str, status: int) -> int:
    """The exit status, once the message is on standard error."""
    print(message, file=sys.stderr)
    return status
