"""Pictures of what a VGG sees: filters, feature maps, dreams, inversions, distances, class activation maps."""
