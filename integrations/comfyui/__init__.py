"""ComfyUI nodes that draw on an inkstream server. They need only packages that ComfyUI installs."""

from .nodes import Draw

NODE_CLASS_MAPPINGS = {"InkstreamDraw": Draw}
NODE_DISPLAY_NAME_MAPPINGS = {"InkstreamDraw": "Draw on an inkstream server"}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
