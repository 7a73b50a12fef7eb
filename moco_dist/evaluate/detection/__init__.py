"""Detection transfer: what a backbone is worth to Faster R-CNN on PASCAL VOC (v1, arXiv 1911.05722, sec. 4.2.1)."""
