-- Tries again what was given up.
local stack = obj.status.rejected
obj.metadata.annotations = obj.metadata.annotations or {}
obj.metadata.annotations["exchange.dev/retry"] = stack.revision .. "." .. stack.attempt
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
