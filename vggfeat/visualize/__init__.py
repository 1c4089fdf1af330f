"""Pictures of what a VGG sees: filters, feature maps, dreams, inversions, distances, class activation maps."""

from vggfeat.visualize.dreams import Dream, DreamStep, Inversion, dream, invert
from vggfeat.visualize.heat import Cam, Distance, Distances, cam, distance, distances
from vggfeat.visualize.sheet import Sheet, check_sheet
from vggfeat.visualize.units import filters, maps

__all__ = [
    "Cam",
    "Distance",
    "Distances",
    "Dream",
    "DreamStep",
    "Inversion",
    "Sheet",
    "cam",
    "check_sheet",
    "distance",
    "distances",
    "dream",
    "filters",
    "invert",
    "maps",
]
