-- Approves exactly the stack and attempt that has passed its gates.
local stack = obj.status.candidate
obj.metadata.annotations = obj.metadata.annotations or {}
obj.metadata.annotations["exchange.dev/promote"] = stack.revision .. "." .. stack.attempt
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
