"""The learner: from groups of rollouts to new weights. The only user is `areal_sub.trainer`.

advantage  returns of a group → group-relative advantages          pure, numpy
schedule   step → learning rate                                    pure
batch      samples → packed micro-batches within a token budget    pure
ratios     how far policies are apart, and importance weights      pure, tensors
loss       logprobs → the policy loss and its statistics           pure, tensors
model      a Hugging Face causal LM that scores trained tokens
adapter    LoRA: what learns instead of the model's weights (peft)
updates    a training step: minibatches, gradients, the optimizer
ranks      several processes as one learner (torch.distributed, FSDP2)
learner    the face of it all, and the weights' way out; __main__: its other processes
checkpoint recovery points; durable: files that are there whole or not at all
"""
