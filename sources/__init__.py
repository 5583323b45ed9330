"""Where weights come from: folders, files and the hub, their layouts, names and settings."""

from sources.find import Source, check_model, expand_home, is_hub_id, resolve_source, weights_in
from sources.parts import check_parts
from sources.read import first_line, open_safetensors, read_config, read_fields, read_stage
from sources.single_file import OTHER_PARTS, as_ours, single_file_table

__all__ = [
    "OTHER_PARTS",
    "Source",
    "as_ours",
    "check_model",
    "check_parts",
    "expand_home",
    "first_line",
    "is_hub_id",
    "open_safetensors",
    "read_config",
    "read_fields",
    "read_stage",
    "resolve_source",
    "single_file_table",
    "weights_in",
]
