"""A checkpoint that loads without `import locum` before: `trust_remote_code=True` runs this file, which imports Locum.

`locum export --to remote-code` puts a copy of it beside config.json and names it there: "auto_map": {"AutoConfig":
"remote_code.Config"}. The model's classes stay transformers' own.
"""

from typing import Any

from transformers import AutoConfig

import locum  # noqa: F401 (registers the loader of compressed layers)


class Config:
    """What transformers asks for the config: the stock class for the checkpoint's model type.

    It is no config class itself. Such a class is registered as the checkpoint's own code, which saving would then copy.
    """

    @staticmethod
    def register_for_auto_class(auto_class: str = "AutoConfig") -> None:
        """Nothing to register."""

    @staticmethod
    def from_pretrained(path: Any, **settings: Any) -> Any:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **settings)
