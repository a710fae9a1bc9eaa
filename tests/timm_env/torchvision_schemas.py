"""Let torchvision import without its compiled operators.

Its Python half registers a fake for two operators that its library defines, and fails where nobody
has defined them. timm calls neither: schemas without kernels are enough. The environment's .pth
file imports this module at every start of Python, so it leaves torch alone until torchvision is
first imported.
"""

import sys


class _BeforeTorchvision:
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
