"""Nodes that draw on an inkstream server. They need nothing that ComfyUI does not bring."""

from .nodes import Draw

NODE_CLASS_MAPPINGS = {"InkstreamDraw": Draw}
NODE_DISPLAY_NAME_MAPPINGS = {"InkstreamDraw": "Draw on an inkstream server"}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
