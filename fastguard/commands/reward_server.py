"""`fastguard reward-server`: a reward for trainers on other machines."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from fastguard.config import RewardConfig


@dataclass(frozen=True)
class RewardServer:
    """Serve a reward over HTTP: a recipe elsewhere names its address in [[rewards]] use."""

    use: tyro.conf.Positional[str]
    """a built-in's name, or module:function"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for other machines (there is no password: keep it in your network)"""
    port: int = 8000
    """port to listen on"""
    options: dict[str, bool | int | float | str] | None = None
    """keyword arguments of the reward, as --options NAME VALUE ..."""

    def __call__(self) -> int:
        from fastguard.rewards.server import run_server

        return run_server(RewardConfig(self.use, options=self.options or {}), self.host, self.port)
