-- What can be done with an ExchangeDeployment now. What makes no sense now is shown, but cannot be chosen.
local status = obj.status or {}
local phase = status.phase
local seen = status.observedGeneration == obj.metadata.generation
local stopped = status.stoppedSince ~= nil
local way_back = false
for _, condition in ipairs(status.conditions or {}) do
  if condition.type == "RollbackAvailable" then
    way_back = condition.status == "True"
  end
end

local moving = phase == "Promoting" or phase == "RollingBack"
local stack = status.candidate or status.live
local pause = (obj.metadata.annotations or {})["exchange.dev/pause"]
local paused = stack ~= nil and pause == stack.revision .. "." .. stack.attempt

local candidate = status.candidate
local leaves = candidate and candidate.revision .. "." .. candidate.attempt
-- A way back that was asked for and was not possible is none any more.
local turns = phase == "Promoting" and leaves ~= nil and leaves ~= (status.handled or {}).rollback

local function action(possible)
  return {disabled = not possible}
end
return {
  promote = action(seen and phase == "AwaitingPromotion" and not stopped),
  abort = action(status.candidate ~= nil and not moving),
  rollback = action(way_back or turns),
  retry = action((phase == "Failed" or phase == "Held") and status.rejected ~= nil and not stopped),
  pause = action(stack ~= nil and not stopped),
  resume = action(paused and stopped),
}
