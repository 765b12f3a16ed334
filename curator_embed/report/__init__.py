"""What a person looks at. Needs NumPy and Pillow only, and nothing else of this package."""

from curator_embed.report.neighbours import Group, Tile, contact_sheet, nearest

__all__ = ["Group", "Tile", "contact_sheet", "nearest"]
