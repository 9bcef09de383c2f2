"""Schedulers, told and asked by their own commands: a script is submitted, a job is asked after and cancelled."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
