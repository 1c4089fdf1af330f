"""The commands `vggstyle` and `vggfeat`: options to one library call, errors to one line. No torch until it is needed."""
