"""The commands `vggstyle` and `vggfeat`: options to one library call, errors to one line. Torch comes when needed."""
