-- Approves exactly the stack and attempt that has passed its gates.
local status = obj.status or {}
-- Argo CD does not ask discovery.lua before it runs this: the menu may be old, or there was none.
local seen = status.observedGeneration == obj.metadata.generation
if not seen or status.phase ~= "AwaitingPromotion" or status.stoppedSince ~= nil then
  error("nothing waits for approval now")
end
local stack = status.candidate
obj.metadata.annotations = obj.metadata.annotations or {}
obj.metadata.annotations["exchange.dev/promote"] = stack.revision .. "." .. stack.attempt
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
