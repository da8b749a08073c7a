"""For all tests: one thread. Tensors are small, and on a busy machine a second thread costs more than it gives."""

import torch

torch.set_num_threads(1)
