"""distpro: knowledge distillation with a searched process."""

from distpro.distance_search import search_by_distance
from distpro.distillation import distill
from distpro.distiller import Distiller
from distpro.errors import UserError
from distpro.features import Features, Teacher
from distpro.gradient_search import search_by_gradient
from distpro.precision import Precision
from distpro.process import Process
from distpro.recipe import Recipe
from distpro.trials import search_by_trials

__version__ = "0.1.0"
__all__ = [
    "Distiller",
    "Features",
    "Precision",
    "Process",
    "Recipe",
    "Teacher",
    "UserError",
    "distill",
    "search_by_distance",
    "search_by_gradient",
    "search_by_trials",
]
