"""`simcse-jax configs`."""

from dataclasses import dataclass, is_dataclass
from typing import Annotated

import tyro

from simcse_jax.commands.options import Command
from simcse_jax.errors import InputError


@dataclass(frozen=True)
class Configs(Command):
    """List the configs that come with the package, or show one with all its settings."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """Name of a config, or path of a config file, to show. Without it, all names are listed."""
    json: bool = False
    """Print JSON."""

    keeps_programs = False

    def run(self) -> None:
        """Prints the list or the config."""
        import json

        from simcse_jax.config.load import VARIABLES, find_config, run_config, shipped_configs, summary
        from simcse_jax.config.values import listed, to_dict

        if self.name is not None:
            path = find_config(self.name, *VARIABLES.values())
            values = run_config(path, "config")
            # A file of an ablation may have the `config` that it starts from as well.
            config = next((values[v] for v in reversed(VARIABLES.values()) if is_dataclass(values.get(v))), None)
            if config is None:
                raise InputError(f"{path} defines none of {', '.join(VARIABLES.values())}: see docs/training.md")
            print(json.dumps(to_dict(config), indent=2) if self.json else "\n".join([f"# {path}", *listed(config)]))
            return
        found = {use: {n: summary(p) for n, p in shipped_configs(v).items()} for use, v in VARIABLES.items()}
        if self.json:
            print(json.dumps(found, indent=2))
            return
        for use, configs in found.items():
            print(f"simcse-jax {use} CONFIG")
            print("\n".join(f"  {name:<20} {about}" for name, about in configs.items()))
        print("simcse-jax configs CONFIG shows one; for a config of your own, copy its file and give the path")
