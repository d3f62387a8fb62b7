"""SDXL's ControlNets and attention patches on a KOALA model: KOALA ControlNet and KOALA Attention Patches."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.model import model_facts
from ..host.protocols import ControlNet, Model
from ..host.transfer import attention
from ..host.transfer.control import adapt
from ..host.transfer.control_file import load_control
from ..koala.architecture.layout import name
from ..koala.words import joined, lines, message
from .base import ADD_ONS, SHOWS, choices, chosen_path, fingerprint, paths_of, shown


class KoalaControlNet(io.ComfyNode):
    """An SDXL ControlNet for KOALA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaControlNet",
            display_name="KOALA ControlNet",
            category=ADD_ONS,
            description="Adapts an SDXL ControlNet, union ControlNet or T2I-Adapter to KOALA's fewer layers. Connect "
            "it between the ControlNet's loader and Apply ControlNet; on SDXL it changes nothing.",
            search_aliases=["controlnet", "sdxl controlnet", "koala controlnet", "t2i adapter", "union controlnet"],
            inputs=[
                io.ControlNet.Input("control_net", tooltip="An SDXL ControlNet or T2I-Adapter from any loader."),
            ],
            outputs=[
                io.ControlNet.Output(
                    display_name="CONTROL_NET", tooltip="The adapted ControlNet, for Apply ControlNet and other nodes."
                ),
            ],
        )

    @classmethod
    def execute(cls, control_net: ControlNet) -> io.NodeOutput:
        return io.NodeOutput(adapt(control_net))


class KoalaControlNetLoader(io.ComfyNode):
    """An SDXL ControlNet for KOALA, from its file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaControlNetLoader",
            display_name="KOALA ControlNet Loader",
            category=ADD_ONS,
            description="Loads an SDXL ControlNet, union ControlNet or T2I-Adapter and adapts it to KOALA's fewer "
            "layers: Load ControlNet and KOALA ControlNet in one node. On SDXL it works as well.",
            search_aliases=["controlnet", "load controlnet", "sdxl controlnet", "koala controlnet", "t2i adapter"],
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=choices("controlnet"),
                    tooltip="A .safetensors file from models/controlnet, made for SDXL. koala-tiny's is built in.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(
                    display_name="CONTROL_NET", tooltip="The adapted ControlNet, for Apply ControlNet and other nodes."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net_name: str = "") -> str:
        """Changes when the file is replaced on disk under the same name."""
        return fingerprint(*paths_of("controlnet", control_net_name))

    @classmethod
    def execute(cls, control_net_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_control(chosen_path("controlnet", control_net_name)))


class KoalaAttentionPatches(io.ComfyNode):
    """Attention patches with SDXL's numbers, remapped to KOALA's blocks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaAttentionPatches",
            display_name="KOALA Attention Patches",
            category=ADD_ONS,
            description="Remaps patches that IP-Adapter, ControlNet-LLLite, Deep Shrink and similar nodes set by "
            "SDXL's block numbers to the matching KOALA blocks. Connect it behind the last of these nodes.",
            search_aliases=["ip-adapter", "ipadapter", "koala ipadapter", "lllite", "deep shrink", "attention patch"],
            inputs=[io.Model.Input("model", tooltip="A KOALA model with patches that were made for SDXL.")],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The same model, its patches on the matching blocks."),
                io.String.Output(
                    display_name="report", tooltip="How many patches were remapped, and which have no block in KOALA."
                ),
            ],
            **SHOWS,
        )

    @classmethod
    def execute(cls, model: Model) -> io.NodeOutput:
        facts, remapped = model_facts(model), model.clone()
        koala, options = name(facts.layout), remapped.model_options
        remapping = attention.remap(options["transformer_options"], facts.lineage)
        said = [message("{count} patches remapped to {model}'s blocks", count=remapping.remapped, model=koala)]
        if remapping.dropped:
            said.append(
                message(
                    "{count} dropped, as {model} lacks their blocks ({places})",
                    count=len(remapping.dropped),
                    model=koala,
                    places=attention.places(place for place, _ in remapping.dropped),
                )
            )
        further = attention.drop_companions(options, remapping)
        further += attention.idle_line(options["transformer_options"], facts.lineage)
        text = lines(joined("; ", said), *further)
        return shown(text, remapped, text)
