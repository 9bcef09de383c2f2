from .guarded import Guarded as Guarded
