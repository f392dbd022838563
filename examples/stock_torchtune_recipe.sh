#!/usr/bin/env bash
# torchtune's own KD recipe with a loss of ours: two overrides, nothing else changes. Further overrides follow the
# name, e.g.  examples/stock_torchtune_recipe.sh kd_loss.temperature=4.0 epochs=2
#
# The config's head names the models to fetch first. CONFIG chooses another config of the stock recipe; any component
# whose name ends in WithChunkedOutputLoss fits, e.g. torchtune_kd.losses.JSDWithChunkedOutputLoss.
set -euo pipefail

tune run knowledge_distillation_single_device --config "${CONFIG:-llama3_2/8B_to_1B_KD_lora_single_device}" \
    kd_loss._component_=torchtune_kd.losses.ForwardKLWithChunkedOutputLoss kd_loss.temperature=2.0 "$@"
